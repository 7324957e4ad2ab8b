"""Two hosts: network namespaces of this machine, joined by a cable, each with its own sshd. Backup, push, pull, and the loss of a site."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ssh.sshd import Sshd, public_part

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A namespace with an sshd, a folder, and a configuration that knows the other host."""

    def __init__(self, folder: Path, space: str, address: str) -> None:
        self.folder = folder
        self.space = space
        self.address = address
        folder.mkdir()
        self.sshd = Sshd(folder / "sshd", extra=f"ListenAddress {address}", port=2222)
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        program = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
        assert program
        config = str(self.folder / "sshd" / "sshd_config")
        self._server = subprocess.Popen(
            ["ip", "netns", "exec", self.space, program, "-D", "-e", "-f", config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._server.stderr is not None
        for line in self._server.stderr:
            if b"listening on" in line and self.address.encode() in line:
                return
        raise AssertionError("sshd did not start")

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait()
            assert self._server.stderr is not None
            self._server.stderr.close()

    def url(self, repository: str) -> str:
        """The address of a repository of this host."""
        return f"ssh://root@{self.address}:2222{self.folder}/{repository}"

    def trust(self, other: Host) -> None:
        """Can log in there from now on."""
        folder = self.folder / "config" / "holdfast"
        folder.mkdir(parents=True)
        (folder / "known_hosts").write_text(
            "".join(f"[{other.address}]:2222 {public_part(key)}\n" for key in other.sshd.host_keys.values())
        )
        self.key = other.sshd.key

    def run(self, *words: object) -> str:
        """Runs `holdfast` on this host; what it prints."""
        environment = os.environ | {
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "HOLDFAST_SSH_KEY": str(self.key),
            "HOLDFAST_REMOTE_COMMAND": f"{sys.executable} -m holdfast serve --stdio",
        }
        environment.pop("HOLDFAST_RSH", None)
        command = ["ip", "netns", "exec", self.space, sys.executable, "-m", "holdfast", *map(str, words)]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    if os.getuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = [f"holdfast{os.getpid()}{letter}" for letter in "ab"]
    made: list[Host] = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip(
                "-n",
                names[0],
                "link",
                "add",
                "cable",
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                names[1],
            )
            for name, address in zip(names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"network namespaces joined by veth can not be made here: {error.stderr.decode().strip()}"
            )
        for name, address in zip(names, ADDRESSES, strict=True):
            host = Host(tmp_path / name[-1], name, address)
            made.append(host)
            host.start()
        made[0].trust(made[1])
        made[1].trust(made[0])
        yield made[0], made[1]
    finally:
        for host in made:
            host.stop()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_a_site_is_lost_and_its_replica_is_restored(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    here, there = hosts
    disk = tmp_path / "web1.raw"
    disk.write_bytes(random.Random(8).randbytes(2 << 20) + bytes(20 << 20))
    # a backup from here to there, pulled by here
    here.run("-r", there.url("direct"), "init")
    here.run("-r", there.url("direct"), "backup", disk)
    here.run("-r", here.folder / "pulled", "init", "--like", there.url("direct"))
    assert "1 copied" in here.run("-r", here.folder / "pulled", "replicate", "--from", there.url("direct"))
    # another one on top of it, pushed back there
    with disk.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"changed")
    here.run("-r", here.folder / "pulled", "backup", disk)
    push = ("-r", here.folder / "pulled", "replicate", "--to", there.url("direct"), "--verify")
    assert "1 copied, 1 there already" in here.run(*push)
    # the first site burns down
    shutil.rmtree(here.folder / "pulled")
    there.run("-r", there.folder / "direct", "restore", "web1@latest", tmp_path / "local")
    here.run("-r", there.url("direct"), "restore", "web1@latest", tmp_path / "remote")
    assert (tmp_path / "local").read_bytes() == (tmp_path / "remote").read_bytes() == disk.read_bytes()
